"""What a pool did: figures for a person, a log or a program."""
