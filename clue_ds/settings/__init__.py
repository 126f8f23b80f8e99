"""How settings reach a command: process start, command line, paths and YAML files."""
