"""What only a GPU can show, for one short visit; see ``benchmarks.gpu.__main__``."""
