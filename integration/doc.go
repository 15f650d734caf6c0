// Package integration holds the tests of whole processes: the real scoriad and
// scoria under real clients (qemu-img, nbdcopy, fio …) and real Linux guests in
// QEMU, killed and restarted; and the tree's import rules.
//
// Packages below it make the test bed: bed (processes and paths), guest (kernel
// and initramfs), qemu (machines), daemon (scoriad); deps installs what is
// needed, demo is `make run`.
//
// The tests need root and what `make deps` installs. They skip where that is
// missing, except under CI or `make test`, where they fail. Every wait has a
// deadline; when one is missed, the daemon gets SIGQUIT and its log with the
// goroutines of both is in the output of the test.
package integration
