"""The demo stream: four tasks of one support desk, written by ``generate.py`` and shipped as data."""
