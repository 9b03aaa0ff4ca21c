"""The machine code of the CUDA kernels, run on the CPU.

`cpp/` is an emulator of PTX, the machine code that Triton and nvcc generate and that ptxas turns into a GPU's own. It
runs a launch's blocks side by side, their warps in an order drawn from a seed, asynchronous copies and products at
varied times, and ends the launch at the first access outside a tensor, misaligned access, race in shared or global
memory, deadlock, or instruction that it does not know. `emulator.py` binds it, `triton_launches.py` puts it in the
place of a GPU under the Triton launchers, `cuda_launches.py` under those of csrc/cuda.

What it cannot show: memory is sequentially consistent (a missing acquire or release is found as a race, reordering
itself is not), lanes of a warp do not race with each other, and time is counted in instructions only.
"""
