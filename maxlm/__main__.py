from maxlm.cli import main

raise SystemExit(main())
