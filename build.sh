cat head.py shard.py split.py rest.py engine.py harness.py opt.py tail.py > ddp.py
