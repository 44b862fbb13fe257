"""Time training steps of the authors' nanoMosaics code, from a checkout of its folder.

Run by `benchmarks.step_time` with a Python that has PyTorch; prints CPU seconds per step as JSON.
"""

import argparse
import json
import sys
import time


def main() -> None:
    """Build the model with the sizes given, and time blocks of steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkout", required=True)
    parser.add_argument("--model", choices=("mosaic", "gpt"), required=True)
    parser.add_argument("--sizes", type=json.loads, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    args = parser.parse_args()
    sys.path.insert(0, args.checkout)

    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = args.sizes
    shared = {
        "block_size": sizes["context_len"],
        "vocab_size": sizes["vocab_size"],
        "n_layer": sizes["depth"],
        "n_head": sizes["num_heads"],
        "n_embd": sizes["dim"],
        "dropout": 0.0,
        "bias": False,
    }
    if args.model == "mosaic":
        from mosaic_model import MemoryMosaic, MemoryMosaicConfig

        model = MemoryMosaic(
            MemoryMosaicConfig(**shared, pmem_size=sizes["memory_size"], pmem_count=1)
        )
    else:
        from gpt_model import GPT, GPTConfig

        model = GPT(GPTConfig(**shared))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    shape = (sizes["batch_size"], sizes["context_len"] + 1)
    tokens = torch.randint(sizes["vocab_size"], shape)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        _, loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    for _ in range(10):
        loss = step()
    seconds = []
    for _ in range(args.blocks):
        start = time.process_time()
        for _ in range(10):
            loss = step()
        seconds.append((time.process_time() - start) / 10)
    print(json.dumps({"seconds": seconds, "loss": loss, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
