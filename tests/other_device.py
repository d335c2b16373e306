"""Another device without one: [`OtherDevice`] tells tensors that were sent to `GPU` from the others, computes with
both on the CPU, and refuses what a real one refuses: an operation on tensors of two devices."""

import torch
from torch.overrides import TorchFunctionMode


GPU = torch.device("cuda:0")
TO_HOST = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item}
# Of two devices in reality too.
BETWEEN = {torch.Tensor.copy_, torch.Tensor.to}


class There(torch.Tensor):
    """A tensor on the other device."""


class OtherDevice(TorchFunctionMode):
    """What `GPU` does with tensors; `room` is how many elements one of them may have there."""

    def __init__(self, room=10**9):
        self.room, self.moved, self.computed = room, 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        there = [value for value in tensors([args, kwargs]) if isinstance(value, There)]
        if func is torch.device:
            return func(*args, **kwargs)
        if func == torch.Tensor.device.__get__:
            return GPU if there else func(*args)
        if func is torch.Tensor.new_tensor:
            return self.there(func(here(args[0]), *args[1:], **kwargs)) if there else func(*args, **kwargs)
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            moved = func(here(args[0]), here(args[1]))
            return self.there(moved) if isinstance(args[1], There) else moved
        wanted = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device) or value in ("cpu",)]
        if GPU in wanted or "cpu" in map(str, wanted):
            args, kwargs = here(strip(args)), here({key: value for key, value in kwargs.items() if key != "device"})
            alone = func is torch.Tensor.to and len(args) + len(kwargs) == 1
            result = args[0] if alone else func(*args, **kwargs)
            if isinstance(result, torch.Tensor) and bool(there) is not (GPU in wanted):
                result = result.clone()  # another device has memory of its own
            self.moved += GPU in wanted
            return self.there(result) if GPU in wanted else result
        if not there:
            return func(*args, **kwargs)
        alien = [t for t in tensors([args, kwargs]) if not isinstance(t, There) and t.dim()]
        assert not alien or func in BETWEEN, f"{func} of tensors on two devices: {[tuple(t.shape) for t in alien]}"
        self.computed += 1
        result = func(*here(args), **here(kwargs))
        if func in TO_HOST or (func is torch.Tensor.copy_ and not isinstance(args[0], There)):
            return result.clone() if func is torch.Tensor.cpu else result
        return self.there(result)

    def there(self, result):
        if isinstance(result, torch.Tensor):
            if result.numel() > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            with torch._C.DisableTorchFunction():
                return result.as_subclass(There)
        if isinstance(result, tuple | list):
            parts = [self.there(part) for part in result]
            return type(result)(parts)
        return result


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for part in value for tensor in tensors(part)]


def here(value):
    """The same on the host."""
    if isinstance(value, There):
        with torch._C.DisableTorchFunction():
            return value.as_subclass(torch.Tensor)
    if isinstance(value, dict):
        return {key: here(part) for key, part in value.items()}
    return type(value)(map(here, value)) if type(value) in (tuple, list) else value


def strip(args):
    return tuple(value for value in args if not isinstance(value, torch.device) and value != "cpu")
