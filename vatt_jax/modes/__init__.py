"""The modes of the command line, one file each. What reads data is given how to open them."""
