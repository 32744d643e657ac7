"""What a run shows a person: the closing text of the command line, and a page of numbers and pictures."""

SAMPLES = 2000  # evaluation images that the networks are shown
