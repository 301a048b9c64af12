"""The exception by which a run stops itself."""


class RunStopped(RuntimeError):
    """The run stopped for its own safety; everything up to the last good step is saved. Exit code 3."""
