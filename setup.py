"""Compiles griffin_offload/native/src, where a C++ compiler is there; without it other kernels do its work."""

import sys
from glob import glob

from setuptools import Extension, setup

GCC = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-w"]
FLAGS = ["/O2", "/std:c++17"] if sys.platform == "win32" else GCC

setup(
    ext_modules=[
        Extension(
            "griffin_offload.native._kernels",
            ["griffin_offload/native/src/kernels.cpp"],
            depends=glob("griffin_offload/native/src/*.h"),
            extra_compile_args=FLAGS,
            export_symbols=[
                "griffin_instructions",
                "griffin_product",
                "griffin_unpack",
                "griffin_to_int4",
                "griffin_rms_norm",
            ],
            optional=True,
            language="c++",
        )
    ]
)
