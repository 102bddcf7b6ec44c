"""Initialisation from the teacher: feature maps and mixes fitted to the far attention of a few thousand tokens.

For each layer, in the teacher's forward pass of each batch:

1. at the first batch, the mix in closed form (`MixFit`), so that the far side is neither drowned nor deafening;
2. a few steps of Adam on the decomposed objective, which fit the feature map (and decays or gates, where the mixer has
   them) to the teacher's far attention;
3. the sums of the mix's least squares under the feature map that there is now.

After the last batch those sums give the mix again, from all tokens. No activation outlives its layer.
"""

import torch
from torch import Tensor

from linearize.attention import Mix, Observation
from linearize.distill.adam import Adam
from linearize.distill.loop import learning_rate
from linearize.distill.objectives import FarTarget, decomposed_loss, student_far

__all__ = ["Calibration", "MixFit", "mix_lr_scale"]

# Measured on layers of SmolLM2-135M with 4 rows of 1024 tokens, far error on other text: 8 steps leave up to 1.4 times
# as much, 48 steps 0.9 times as much at three times the cost, and after 10k tokens of transfer they are no better.
UPDATES = 16
LR = 2e-2


class MixFit:
    """The mix, weight (H, D) and bias (H,), under which the student's far log-odds are the teacher's, in closed form.

    For each head, least squares over the tokens of all batches that were added, of

        w.q + b  ~  log (Z_far / Z_near) of the teacher - (log n - log Z_near) of the student

    (under "gate" of the teacher's log-odds alone, under "peak" with log Z_near from the peak), each token weighed by
    rho (1 - rho) + 0.01: by which an error of its log-odds changes the output, and a little more. A ridge of 1 keeps w
    bounded where a head's queries do not span D dimensions. A mix without a weight has a bias only. Kept are the sums
    of weight * [q, 1] [q, 1]^T and weight * [q, 1] y, in float64.
    """

    def __init__(self) -> None:
        self.sums: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, seen: Observation, target: FarTarget) -> None:
        """One more batch of the same layer."""
        mix = seen.layer.mix
        assert mix is not None, "no mix to fit"
        wanted, counted = target.far_log_odds, target.counted.expand_as(target.far_log_odds)
        if seen.layer.linearize_config.mix != "gate":
            _, log_mass = student_far(seen, target)
            counted = counted & (log_mass > -torch.inf)
            wanted = wanted + target.mix_lse - log_mass.masked_fill(~counted, 0.0)
        share = target.far_share
        weight = ((share * (1 - share) + 1e-2) * counted).double()
        inputs = torch.ones_like(target.q[..., :1], dtype=torch.float64)
        if mix.weight is not None:
            inputs = torch.cat([target.q.double(), inputs], dim=-1)
        weighted = inputs * weight[..., None]
        gram = (inputs.transpose(-1, -2) @ weighted).sum(0)
        moment = (weighted.transpose(-1, -2) @ wanted.masked_fill(~counted, 0.0).double()[..., None]).sum(0)
        self.sums = (gram, moment) if self.sums is None else (self.sums[0] + gram, self.sums[1] + moment)

    @torch.no_grad()
    def set(self, mix: Mix) -> None:
        """Give the solution to `mix`; at least one batch was added."""
        assert self.sums is not None, "nothing was added"
        gram, moment = self.sums
        ridge = torch.ones(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        ridge[-1] = 1e-8  # the bias is free: no head starts too loud or too quiet on average
        solution = torch.linalg.solve(gram + ridge.diag(), moment).squeeze(-1)
        if mix.weight is not None:
            mix.weight.copy_(solution[:, :-1])
        mix.bias.copy_(solution[:, -1])


def mix_lr_scale(name: str) -> float:
    """The mix's weight meets queries with norms of 10 and more; a step as large as the others' would overshoot."""
    return 0.1 if name.endswith("mix.weight") else 1.0


class Calibration:
    """An observer of the teacher's forward passes, see the module; `finish` after the last of `batches` passes.

    losses: of each layer, the decomposed objective on each batch before the layer learned from it. The first is that of
    the closed-form mix alone.
    """

    def __init__(self, batches: int):
        self.losses: dict[int, list[float]] = {}
        self._local_steps = max(1, round(UPDATES / batches))
        self._updates = self._local_steps * batches
        self._layers: dict[int, tuple[Mix | None, MixFit, Adam]] = {}

    def __call__(self, seen: Observation) -> Tensor:
        """Fit the layer to what it saw; returns the teacher's attention."""
        target = FarTarget(seen)
        layer, index = seen.layer, seen.layer.layer_idx
        if index not in self._layers:
            named = {name: p for name, p in layer.named_parameters() if name.startswith(("mixer.", "mix."))}
            self._layers[index] = layer.mix, MixFit(), Adam(named, mix_lr_scale)
            self.losses[index] = []
            if layer.mix is not None:
                start = MixFit()
                start.add(seen, target)
                start.set(layer.mix)
        _, fit, optimizer = self._layers[index]
        done = len(self.losses[index]) * self._local_steps
        for step in range(self._local_steps):
            rate = learning_rate((done + step) / self._updates, LR, 0.0)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            with torch.enable_grad():
                loss = decomposed_loss(seen, target)
                loss.backward()
            if not step:
                self.losses[index].append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
        if layer.mix is not None:
            fit.add(seen, target)
        return target.attention(seen)

    def finish(self) -> None:
        """Give each layer the mix of all batches."""
        for mix, fit, optimizer in self._layers.values():
            optimizer.close()
            if mix is not None:
                fit.set(mix)
