"""What crosses a process border, and the settings every process reads.

Every other package may import this one; it imports none of them and never torch. All types
here are immutable: whoever receives one may keep it without a copy.
"""
