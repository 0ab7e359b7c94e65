"""Which frames of a video are shown. Pure."""


def segment_middles(first: int, last: int, count: int) -> list[int]:
    """``count`` numbers from ``first`` to ``last``: the middles of equal segments.

    The formula is the reference's (``get_index`` of InternVL's ``load_video``), which repeats
    frames where there are fewer than asked for; here all of them are shown once.
    """
    if count > last - first:
        return list(range(first, last + 1))
    segment = (last - first) / count
    return [int(first + segment / 2 + round(segment * k)) for k in range(count)]
