"""Networks: loading, facts about them, and taps."""
