"""What `medtrain doctor` looks at: one module a subject, each a list of findings.

`…_task` modules run in processes of their own: a driver that hangs, a kernel that kills its process
or a firewall ends in a finding, never in a doctor that hangs or dies.
"""
