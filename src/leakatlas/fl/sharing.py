"""What leaves a client: everything, a head, adapters, all but the normalisation, all but a secret.

``shared`` is a list of patterns over the names of parameters and buffers, read in order; the last
one that matches a name decides.

=====================  =======================================================================
``"*"``                everything
``"fc.*"``             names, as the shell matches file names
``"!fc.weight"``       all but these (a list that begins so starts from everything)
``"@BatchNorm*"``      parameters and buffers of modules of such a class
``"!@BatchNorm*"``     all but those: FedBN
=====================  =======================================================================

Parameters that take no gradient are constants: they are handed out with the model, and no part of
an update, whatever the patterns say. What is trained and not shared stays on the client: it starts
from the model as handed out and moves there, which the adversary does not see.

The patterns are read on the agreed model. What a malicious server adds to it is sent: a server that
knows the patterns can name its layers so that they match. A client that compares the names it sends
with a list of its own is better off than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from leakatlas.errors import InvalidParameter


def frozen_names(model: nn.Module) -> frozenset[str]:
    """Parameters that take no gradient."""
    return frozenset(name for name, p in model.named_parameters() if not p.requires_grad)


def unshared_names(model: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """Trained parameters, and buffers, that stay on the client.

    Raises:
        InvalidParameter: If a pattern matches nothing, or no trained parameter is left to share.
    """
    names = {name: model for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    owners = {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, module in model.named_modules()
        for name in [*module._parameters, *module._buffers]
    }
    shared = {name: bool(patterns) and patterns[0].startswith("!") for name in names}
    for pattern in patterns:
        keep, body = not pattern.startswith("!"), pattern.removeprefix("!")
        if body.startswith("@"):
            hit = [
                n for n in names
                if n in owners and fnmatchcase(type(owners[n]).__name__, body.removeprefix("@"))
            ]  # fmt: skip
        else:
            hit = [n for n in names if fnmatchcase(n, body)]
        if not hit and body != "*":
            raise InvalidParameter(
                f"shared: {pattern!r} matches no parameter, buffer or class of "
                f"{type(model).__name__}; it has: {_some(list(names))}."
            )
        shared |= dict.fromkeys(hit, keep)
    frozen = frozen_names(model)
    trained = [name for name, _ in model.named_parameters() if name not in frozen]
    if not trained:
        raise InvalidParameter(
            f"{type(model).__name__} has no parameter that takes gradients, so its client has "
            "nothing to train; leave requires_grad=True where training happens."
        )
    if not any(shared[name] for name in trained):
        raise InvalidParameter(
            f"shared: {', '.join(patterns) or 'an empty list'} leaves no trained parameter to "
            f"send; trained are: {_some(trained)}."
        )
    return frozenset(n for n, kept in shared.items() if not kept and n not in frozen)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown}, ... ({len(names)} in all)"
