"""``python -m bench``: see `bench.cli.main`."""

if __name__ == "__main__":
    # Imported here, because worker processes import the main module too and need none of it.
    from bench.cli.main import app

    app(prog_name="python -m bench")
