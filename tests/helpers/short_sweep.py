"""The flags of a sweep that is done in seconds."""

SHORT = {
    'dataset': 'digits',
    'reference_steps': 100,
    'surgery_steps': 100,
    'finetuning_steps': 50,
    'refresh_every': 20,
    'record_every': 50,
    'checkpoint_every': 50,
    'batch_size': 16,
    'compressions': '5,20',
    'seeds': 2,
}
