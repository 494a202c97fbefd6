"""What the command line does, one file for each --mode. Whatever reads data is given how to open them."""
