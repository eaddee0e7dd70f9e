"""``python -m medmo_edge`` is the ``medmo-edge`` command."""

from medmo_edge.cli import main

if __name__ == "__main__":
    main()
