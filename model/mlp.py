"""What follows attention in a layer of the decoder: one MLP, or a few of many."""

from torch import Tensor, nn

from model.layers import Activations, Linear, Router
from model.ops import Ops
from model.schema import ExpertsConfig


class MLP(nn.Module):
    """SwiGLU, ``[N, hidden] -> [N, hidden]``; gates and what they gate come from one product."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, normed: Activations, ops: Ops) -> Tensor:
        return ops.linear(self.down, ops.gate_up_for(self.gate_up, normed, self.down))


class Experts(nn.Module):
    """A mixture of MLPs, ``[N, hidden] -> [N, hidden]``: every token goes to the few that the
    router gives the largest shares."""

    def __init__(self, hidden_size: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.router = Router(hidden_size, config.count, bias=False)
        self.experts = nn.ModuleList(
            MLP(hidden_size, config.intermediate_size) for _ in range(config.count)
        )
        self._config = config

    def forward(self, normed: Tensor, ops: Ops) -> Tensor:
        normed = ops.keep(normed)
        shares = ops.linear(self.router, normed).float().softmax(-1)
        shares, chosen = shares.topk(self._config.chosen, dim=-1)
        if self._config.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        return ops.experts(self.experts, normed, chosen, shares.to(normed.dtype))
