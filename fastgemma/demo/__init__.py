"""`python -m fastgemma demo`: one LoRA fine-tuning run, stock and patched, side by side.

Three subprocesses, so that nothing leaks from one to the next: `prepare` builds a small Gemma 4 with the structure of
E2B, teaches it some text and writes an ordinary checkpoint; `stock` and `patched` each load that checkpoint and run
the same TRL `SFTTrainer` script on the same data with the same seed. The two differ in one line, `fastgemma.patch()`.

On a GPU the run is QLoRA in bfloat16. Without one it is LoRA in float32, and the kernels run in Triton's interpreter:
that shows that they compute the same, and says nothing about speed.
"""
