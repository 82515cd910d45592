"""Compiles griffin_offload/quant/native, where a C++ compiler is there; without it other kernels do its work."""

import sys

from setuptools import Extension, setup

FLAGS = ["/O2", "/std:c++17"] if sys.platform == "win32" else ["-O3", "-std=c++17", "-fvisibility=hidden", "-w"]

setup(
    ext_modules=[
        Extension(
            "griffin_offload.quant._products",
            ["griffin_offload/quant/native/products.cpp"],
            depends=["griffin_offload/quant/native/products.h"],
            extra_compile_args=FLAGS,
            export_symbols=["griffin_instructions", "griffin_product"],
            optional=True,
            language="c++",
        )
    ]
)
