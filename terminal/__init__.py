"""What a command line needs, whichever its commands are: options, help, values from a file, pictures. No PyTorch."""
