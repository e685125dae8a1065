"""``python -m dig``."""

from dig.cli import app

if __name__ == "__main__":
    app(prog_name="python -m dig")
