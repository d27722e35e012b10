from support.counted_adam import CountedAdam
from torch.optim import SGD


class FusedAdam(CountedAdam):
    pass


class FusedSGD(SGD):
    pass
