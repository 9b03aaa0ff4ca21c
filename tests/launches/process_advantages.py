from qrm_fast.triton.process_advantages import launch, launch_rows

from . import MANY, ODD_K, ODD_S, ODD_T, K, S, T, flags, fp32, fp64, i32, i64


def launches(capability):
    def from_returns(index, steps, sequences, outcomes, penalty, *options):
        of_sequence = index(steps), index(sequences + 1), index(sequences), *outcomes, penalty
        launch(fp64(steps), *of_sequence, ODD_T if penalty is None else T, *options)

    coefficients = 3000.0, 1.0, 1.0
    outcomes = fp32(ODD_S), flags(ODD_S)
    if capability != 100:
        some = outcomes if capability == 80 else (None, None)
        from_returns(i64, ODD_K, ODD_S, some, None, "paper", *coefficients, False)
        from_returns(i64, ODD_K, ODD_S, outcomes, None, "openrlhf", *coefficients, True)
    if capability != 80:
        from_returns(i64, ODD_K, ODD_S, outcomes, None, "paper-step", *coefficients, False)
        from_returns(i32, K, S, (fp32(S), flags(S)), fp32(T), "openrlhf", *coefficients, True)
    index = i32 if capability == 80 else i64
    from_returns(index, K, MANY, (fp32(MANY), flags(MANY)), fp32(T), "verl", *coefficients, False)
    if capability == 90:
        of_sequence = i64(K), i64(MANY + 1), i64(MANY), fp32(MANY), flags(MANY), fp32(T)
        launch_rows(fp32(K), *of_sequence, T, "soft", 0.1, "verl", *coefficients, False)
