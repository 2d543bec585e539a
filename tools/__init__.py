"""Small programs around the trainer. Each is run as `python tools/NAME.py --help`."""
