"""The commands of ``internvl``, one module each: ``add`` makes the parser, ``run`` runs it.

The modules are all imported to build the parser, so they import nothing slow: what a command needs
is imported when it runs.
"""
