"""The pieces of a distillation: methods chosen, networks assembled, teachers, gate, the one trained module."""
