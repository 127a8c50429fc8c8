"""Starts vllm-router with its own arguments, without its second router in Python, which needs twenty more packages."""

import argparse

from vllm_router.router import Router
from vllm_router.router_args import RouterArgs

parser = argparse.ArgumentParser()
RouterArgs.add_cli_args(parser, use_router_prefix=False)
router_args = RouterArgs.from_cli_args(parser.parse_args(), use_router_prefix=False)
Router.from_args(router_args).start()
