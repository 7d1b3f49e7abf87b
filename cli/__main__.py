from pscope.cli import main

main()
