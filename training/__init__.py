"""What train.py calls: read it when you change how a run learns, resumes or reports.

    objective.py             likelihood, preference pairs (DPO), the contrastive term
    curriculum.py            stages of a run and their loaders
    parallel.py              DDP, FSDP2, sums over ranks
    plan.py                  what a run holds in memory
    run_state.py             optimizer, loader, RNG: everything that exact resume needs
    monitor.py               metrics, trackers, speed, memory
    evaluation_samples.py    texts spoken and measured at every evaluation
    sweep.py                 several runs, one table
"""
