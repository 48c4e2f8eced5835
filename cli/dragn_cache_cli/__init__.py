"""The command line of dragn-cache: it parses, calls the library and prints. One file a command."""
