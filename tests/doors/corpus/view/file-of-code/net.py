import os
os.mkdir('leakatlas-canary')
