"""Search over one's own videos: an index of their windows, its nearest neighbours, a web page."""
