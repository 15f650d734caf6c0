package mem

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// TestP7BudgetBoundsMappings: bytes and mappings are counted in whole pages, here
// and above, and come back when the last reference goes.
func TestP7BudgetBoundsMappings(t *testing.T) {
	fd, err := CreateMemfd("budget", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	all := NewBudget(nil, 1<<20, 3)
	one, two := NewBudget(all, 16<<10, 2), NewBudget(all, 1<<20, 100)
	used := func(b *Budget, bytes uint64, mappings int) {
		t.Helper()
		if n, m := b.Used(); n != bytes || m != mappings {
			t.Fatalf("%d bytes in %d mappings, want %d in %d", n, m, bytes, mappings)
		}
	}
	a, err := one.Map(fd, 100, 4096) // touches two pages
	if err != nil {
		t.Fatal(err)
	}
	used(one, 8192, 1)
	used(all, 8192, 1)
	if _, err := one.Map(fd, 0, 8193); !errors.Is(err, ErrBudget) {
		t.Fatalf("more bytes than are left: %v", err)
	}
	b, err := one.Map(fd, 0, 8192)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := two.Map(fd, 0, 1<<20); !errors.Is(err, ErrBudget) {
		t.Fatalf("more bytes than are left above: %v", err)
	}
	if _, err := two.Map(fd, 1<<20, 4096); !errors.Is(err, ErrFileTooShort) {
		t.Fatal(err)
	}
	if _, err := two.Map(-1, 0, 4096); err == nil {
		t.Fatal("mapped nothing")
	}
	c, err := two.Map(fd, 0, 4096)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := two.Map(fd, 0, 4096); !errors.Is(err, ErrBudget) {
		t.Fatalf("more mappings than are left above: %v", err)
	}
	used(two, 4096, 1)
	b.Retain()
	b.Release()
	used(one, 16<<10, 2)
	for _, m := range []*Mapping{a, b, c} {
		m.Release()
	}
	for _, x := range []*Budget{one, two, all} {
		used(x, 0, 0)
	}
	if n := MaxMappings(); n < 1000 {
		t.Errorf("the kernel allows %d mappings", n)
	}
}
