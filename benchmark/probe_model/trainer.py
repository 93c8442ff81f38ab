"""One optimiser step, and all of them: until the time or the steps are used up."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from time import monotonic

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.results import environment, write_json

from .adapter import Adapter
from .batches import Batch, BatchFeed, plan
from .checkpoint import Spent, load_checkpoint, save_checkpoint
from .meter import AnswerMeter
from .model import ProbeModel
from .schedule import learning_rate
from .settings import TrainSettings

_LEAST_WEIGHT = 200.0
_LARGEST_GRADIENT = 1.0
_BATCHES_AHEAD = 24
_STEPS_A_LINE = 25
_SECONDS_A_TABLE = 60
_SECONDS_A_CHECKPOINT = 90


class Trainer:
    """Trains an adapter on a frozen model with AdamW, in `folder`, from its checkpoint on where it has one."""

    def __init__(self, model: ProbeModel, settings: TrainSettings, folder: Path) -> None:
        self.model, self.settings, self.folder = model, settings, folder
        self.adapter = Adapter(model, settings.rank, settings.alpha)
        self.meter = AnswerMeter()
        self._unread: list[tuple[Batch, Tensor, Tensor]] = []
        self._parameters = [parameter for _, parameter in self.adapter.named_parameters()]
        self._optimiser = torch.optim.AdamW(
            self._parameters,
            settings.peak_rate,
            betas=(0.9, 0.98),
            eps=1e-8,
            weight_decay=0.0,
            fused=model.device.type == "cuda",
        )
        self.spent = load_checkpoint(folder, self.adapter, self._optimiser, settings)

    def step(self, batch: Batch, rate: float) -> tuple[Tensor, Tensor]:
        """Weighted mean cross entropy over the answer tokens; its gradient, clipped to norm 1; one AdamW step.

        Returns the loss [] and how many tokens of each answer [answers] were predicted wrongly. Batches whose answers
        weigh less than 200 in all count for less.
        """
        device = self.model.device
        ids, positions, targets, weights, owners = (
            torch.from_numpy(array).to(device)
            for array in (batch.ids, batch.positions, batch.targets, batch.weights, batch.owners)
        )
        states = self.model.hidden(ids.long(), self.adapter.merge(self.model))
        logits = self.model.logits(states.flatten(0, 1)[positions]).float()
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum().clamp(min=_LEAST_WEIGHT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, _LARGEST_GRADIENT)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        wrong = (logits.detach().argmax(-1) != targets).float()
        return loss.detach(), torch.zeros(len(batch.tasks), device=device).index_add_(0, owners, wrong)

    def run(self, feed: BatchFeed) -> Spent:
        """Trains to the end of the settings' time or steps; prints how it goes, and keeps a checkpoint."""
        settings, spent = self.settings, self.spent
        start = monotonic() - spent.seconds
        told_at = kept_at = spent.seconds
        asked = spent.steps
        while (progress := settings.progress(spent.steps, spent.seconds)) < 1:
            while asked < spent.steps + _BATCHES_AHEAD:
                # Counted in steps, a batch depends on its own step alone; in time, on when it is asked for.
                feed.ask(plan(settings, asked, settings.progress(asked, spent.seconds)))
                asked += 1
            batch = feed.take()
            rate = learning_rate(settings.peak_rate, settings.warmup_steps, spent.steps, progress)
            self._unread.append((batch, *self.step(batch, rate)))
            spent.steps += 1
            spent.tokens += batch.ids.size
            spent.seconds = monotonic() - start
            if spent.steps <= 2 or spent.steps % _STEPS_A_LINE == 0:
                self._read_results()
                print(f"{self._state()} rate {rate:.1e}, {len(feed)} batches ahead", flush=True)
            if spent.seconds - told_at > _SECONDS_A_TABLE:
                told_at = spent.seconds
                print(self.meter.table(), flush=True)
            if spent.seconds - kept_at > _SECONDS_A_CHECKPOINT:
                kept_at = spent.seconds
                self._keep()
        self._read_results()
        self._keep()
        return spent

    def save(self) -> None:
        """Writes the adapter in peft's layout, and training.json: settings, what was spent, where, the last loss."""
        settings, loss = self.settings, self.meter.loss
        self.adapter.save(self.folder, settings.rope_theta, settings.max_positions)
        record = {
            "settings": asdict(settings),
            "spent": asdict(self.spent),
            "loss": loss.value if loss.weight else None,
        }
        write_json(self.folder / "training.json", {**record, "environment": environment()})

    def _keep(self) -> None:
        save_checkpoint(self.folder, self.adapter, self._optimiser, self.settings, self.spent)

    def _read_results(self) -> None:
        """Waits for the GPU, which is why it is not done after every step."""
        for batch, loss, wrong in self._unread:
            self.meter.add(batch, loss, wrong)
        self._unread.clear()

    def _state(self) -> str:
        spent = self.spent
        speed = spent.tokens / spent.seconds / 1e3
        return (
            f"step {spent.steps}, {spent.tokens / 1e6:.1f} M tokens, {spent.seconds:.0f} s, {speed:.1f} k tokens/s, "
            f"loss {self.meter.loss.value:.3f},"
        )
