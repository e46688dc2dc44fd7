__version__ = "0.1.0"


def __getattr__(name: str):
    "`vireid_nb.load(run)`, fetched when first asked for: importing the package alone stays cheap."
    if name == "load":
        from .use import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
