"""The artefact, its card, and the Hub they are pushed to."""
