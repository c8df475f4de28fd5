"""What the training scripts share: a loop that stops by the clock, a moving average of the weights, a printed loss."""

import math
import time

import torch


class Trainer:
    """AdamW with a cosine learning rate over a time budget, and the exponential moving average that is kept in the end.

    The schedule follows the clock and not a count of steps, so that the same command suits any machine.
    """

    def __init__(self, parameters, rate, minutes, ema, clip=1.0):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.rate, self.seconds, self.ema, self.clip = rate, minutes * 60, ema, clip

    def run(self, loss_of_step, report_every):
        """`loss_of_step(step)` returns the loss and a dict of figures; the means of `report_every` steps are printed. Leaves the averaged weights in
        place."""
        start, step, sums, reports = time.monotonic(), 0, {}, []
        while (progress := (time.monotonic() - start) / self.seconds) < 1 or step == 0:
            warm_up = min(1.0, (step + 1) / 20)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            loss, figures = loss_of_step(step)
            if not torch.isfinite(loss):
                raise SystemExit(f"loss is {loss.item()} at step {step}; lower the learning rate")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
            self.optimizer.step()
            step += 1
            self._average(step)

            for name, value in {"loss": loss.detach(), **figures}.items():
                sums.setdefault(name, []).append(torch.as_tensor(value).item())
            if step % report_every == 0:
                reports.append(self._report(step, time.monotonic() - start, sums))
                sums = {}
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average):
                parameter.copy_(average)
        if not reports:
            reports.append(self._report(step, time.monotonic() - start, sums))
        print(f"loss {reports[0]['loss']:.4f} -> {reports[-1]['loss']:.4f} in {step} steps", flush=True)

    @torch.no_grad()
    def _average(self, step):
        keep = min(self.ema, step / (step + 10))  # short runs forget their start in time
        torch._foreach_lerp_(self.average, self.parameters, 1 - keep)

    @staticmethod
    def _report(step, seconds, sums):
        means = {name: sum(values) / len(values) for name, values in sums.items() if values}
        print(
            f"step {step:5d} {seconds:6.0f} s  " + "  ".join(f"{name} {mean:.4f}" for name, mean in means.items()),
            flush=True,
        )
        return means
