"""What a row may say: lives, phases, quantities with their units, and conditions with their meanings.

Declared once. A row that uses another word fails, and names the nearest one here.
"""

from __future__ import annotations

from typing import NamedTuple

Condition = str | int | float | bool | None  # the value of one

LIVES = ("training", "inference")
TRAINING = ("forward", "loss", "backward", "optimizer")
PHASES = (*TRAINING, "prefill", "decode")
BESIDE = (
    "data",
    "transfer",
    "clipping",
    "logging",
    "validation",
    "checkpointing",
    "hand-over",
    "sampling",
    "reward",
    "old policy",
    "reference policy",
    "framework",
    "communication",
    "residual",
)
WHOLES = ("step", "token", "run")
PER = ("step", "token", "sequence", "run")
PROVENANCES = ("measured", "counted", "predicted", "estimated", "unavailable")
CONVENTIONS = ("model", "causal", "hardware")  # of FLOPs: cost.py says what each counts


class Quantity(NamedTuple):
    units: tuple[str, ...]  # the first unless a row says another
    meaning: str


QUANTITIES = {
    "time": Quantity(("s",), "wall time of one execution"),
    "flops": Quantity(("flop",), "multiplications and additions of matrix products"),
    "bytes": Quantity(("byte",), "memory traffic, or what is sent between processes"),
    "memory": Quantity(("byte",), "memory held at the peak, or one category of it"),
    "energy": Quantity(("joule",), "energy of one execution, idle power subtracted"),
    "money": Quantity(("usd",), "what the device's time costs"),
    "loss": Quantity(("nat",), "mean cross-entropy of a token"),
    "bits_per_byte": Quantity(("bit",), "the same, for each byte of the text"),
    "throughput": Quantity(("token/s",), "tokens trained a second, validation and checkpoints apart"),
    "loss_by_flops": Quantity(("nat",), "the same, against the FLOPs of training so far"),
    "time_to_loss": Quantity(("s",), "training time until a loss is reached"),
    "identity": Quantity(("differing logits",), "logits of the frozen forward that are not training's, bit for bit"),
    "difference": Quantity(("nat", "logit", "differing logits"), "how far one computation is from another"),
    "exponent": Quantity(("power",), "slope of log time over log size"),
    "error": Quantity(("of measured",), "predicted over measured, less one"),
    "reward": Quantity(("of 1",), "mean reward of an answer, as a program judges it"),
    "rollout": Quantity(("of a step",), "share of a reinforcement-learning step's time that is spent on answers"),
    "rollout elsewhere": Quantity(("of a step",), "the same, predicted for other hardware"),
    "importance ratio": Quantity(("x",), "a token under the policy over it under its sampler: the largest, either way"),
    "accepted": Quantity(("of proposals",), "share of a draft's tokens that the large model kept"),
    "tokens a forward": Quantity(("token",), "tokens gained by one forward of the large model"),
    "operators": Quantity(("s",), "time inside one kind of operator"),
    "reference": Quantity(("s",), "time of a model that never changes"),
    "state": Quantity(("byte",), "what an optimizer keeps beside the weights"),
    "added time": Quantity(("x",), "time found in a phase, as a multiple of what was planted"),
    "retained": Quantity(("byte",), "bytes that outlive the step"),
    "own time": Quantity(("s",), "time of the instrument itself"),
    "false differences": Quantity(("comparisons",), "comparisons of equals that were told apart"),
    "decided": Quantity(("comparisons",), "comparisons with a given outcome"),
    "peak_flops": Quantity(("flop/s",), "the most the device computes"),
    "peak_bandwidth": Quantity(("byte/s",), "the most the device reads"),
    "bandwidth": Quantity(("byte/s",), "of messages between processes"),
    "bandwidth of copies": Quantity(("byte/s",), "memory read and written"),
    "bandwidth of reads": Quantity(("byte/s",), "memory read"),
    "best rate": Quantity(("flop/s",), "the most one kind of operator computes"),
    "latency": Quantity(("s",), "of an empty message between processes"),
    "time beside each operator": Quantity(("s",), "dispatch of one operator"),
    "operators together": Quantity(("x",), "time in place over time alone"),
    "break-even": Quantity(("tokens",), "served tokens that cost as much as training"),
    "days until break-even": Quantity(("days",), "at the stated requests a day"),
    "against a trained token": Quantity(("x",), "cost of a served token over that of a trained one"),
    "cheapest size": Quantity(("parameters",), "of the model that costs least over its life"),
    "saved": Quantity(("of the cost",), "against the model that was named"),
    "users that fit": Quantity(("users",), "whose caches fit beside the weights"),
    "batch as costly as training": Quantity(("sequences",), "decode batch at which a served token costs a trained one"),
}

CONDITIONS = {
    # the model
    "model": "class of the module",
    "family": "the model family",
    "layers": "blocks",
    "width": "features of the residual stream",
    "heads": "query heads",
    "vocab": "rows of the embedding",
    "parameters": "all weights, tied ones once",
    "architecture": "the Transformers architecture that was wrapped",
    # what is run
    "batch": "sequences of one execution",
    "length": "tokens of one sequence",
    "tokens": "tokens that one execution handles",
    "prompt": "tokens of the prefill",
    "new_tokens": "tokens generated after it",
    "context": "tokens before the one decoded, itself included",
    "cache": "whether a KV cache is used",
    "head": "positions the head is applied to",
    "dtype": "of the activations",
    "compile": "whether torch.compile is used",
    "checkpointing": "activations recomputed in backward",
    "micro_batches": "parts that one optimizer step is cut into",
    "optimizer": "the update rule",
    "in_place_of": "the optimizer that trained, where the usual one is measured beside it",
    "adapter": "what of the model is trained, or beside it; all of it where this is not said",
    "lr": "learning rate",
    "threads": "CPU threads",
    "precision": "of the activations, as asked",
    "accumulate": "parts that one optimizer step is cut into",
    "attention_backward": "fused or plain matrix products",
    "kernels": "how small products are computed",
    "cold": "the very first execution of a fresh process",
    "executions": "executions averaged in one sample",
    "processes": "processes that work together",
    "temperature": "of sampling",
    "recipe": "a named training recipe",
    "text": "hash of the corpus",
    "held_out_tokens": "of the text that was judged",
    "logits": "how many were compared",
    "seed": "of weights and data",
    "group": "answers to one prompt",
    "epochs": "updates on the same answers",
    "reward": "the program that judges answers",
    "predicted": "the preset that a forecast is of",
    "which": "part of a training",
    # what is compared
    "averaged": "where gradients are averaged between processes",
    "axis": "what is scaled",
    "factor": "by how much",
    "busy": "share of the device's time that is used",
    "change": "the setting changed, or the overrides of a sweep's run",
    "compared": "which pair",
    "draft_tokens": "tokens proposed before each forward",
    "forward": "another forward than training's, and which",
    "how": "which of several ways",
    "layer": "kind of layer",
    "layout": "a model drawn for checking predictions",
    "outcome": "of a comparison",
    "peer": "which implementation",
    "plant": "what was planted",
    "planted_in": "the phase it was planted in",
    "rung": "how far towards a training step",
    "stream": "which part of the traffic",
    "through": "by which loop",
    "way": "which of several ways",
    "weights": "when they are cast",
    # memory
    "category": "what the memory is held for",
    "peak_phase": "the phase of the peak",
    "checkpoint_bytes": "size of the file",
    # the machine and what is known of it
    "hardware": "the device a figure holds for",
    "hardware_source": "where its peaks are from",
    "source": "where a figure is from",
    "calibration": "id of the calibration a prediction rests on",
    "pace": "time now over time when calibrated",
    "peaks": "measured or of the data sheet",
    "peak_flops_per_s": "of the device",
    "peak_bytes_per_s": "of the device",
    "kernel": "a reference kernel",
    "operator": "kind of operator",
    "operators": "kind of operator",
    "shape": "of its operands",
    "measured": "how many shapes were measured",
    "bytes": "read by one execution",
    "bytes_together": "that lie together",
    "of": "whose figure it is",
    # training curves
    "step": "optimizer steps taken",
    "training_time_s": "time in training steps",
    "training_gflop": "FLOPs of training so far",
    "goal": "the loss to reach",
    "goal_nats": "its value",
    # lifetime
    "cost": "what is counted as cost",
    "counted": "what it is counted in",
    "decode_batch": "sequences decoded together",
    "decode_mbu": "share of the peak bandwidth in decode",
    "prefill_mfu": "share of the peak FLOP/s in prefill",
    "training_mfu": "share of the peak FLOP/s in training",
    "devices": "devices",
    "devices_needed": "devices that the load needs",
    "price_per_hour": "of a device, usd",
    "training_price_per_hour": "of a training device, usd",
    "requests_per_day": "load",
    "served_tokens": "in the model's life",
    "trained_tokens": "in its training",
    "training_length": "tokens of a training sequence",
    "method": "of training: supervised where this is not said",
    "tdp_w": "power of the device by its data sheet",
    # experiments
    "comparisons": "how many were made",
    "spread": "of the samples",
    # plans
    "strategy": "how training is shared between devices",
    "users": "sequences served at once",
    "fits": "whether the memory of the device is enough: yes, no or uncertain",
    "basis": "what a predicted time rests on",
}
