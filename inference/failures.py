"""What other people's exceptions mean."""


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on the host or on a device."""
    words = str(error)
    return isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words


def one_line(error: BaseException) -> str:
    """The message of an error as one line of no more than 300 characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else words[:297] + "..."
