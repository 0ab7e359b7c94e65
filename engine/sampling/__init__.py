"""From logits to a token: the steps that change logits, in the order they are applied."""

from engine.sampling.filters import MinP, Step, Temperature, TopK, TopP

STEPS: tuple[Step, ...] = (Temperature(), TopK(), TopP(), MinP())
