from flora_export.cli import main

main()
