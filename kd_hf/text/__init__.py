"""Text for people: Markdown, and what a terminal shows."""
