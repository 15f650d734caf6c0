package host

import (
	"os"
	"path/filepath"
	"testing"

	"scoria/driver/control"
)

// TestRemovedASDIsForgotten: a removed storage daemon leaves the list when its parts are
// rebuilt; its disk is refused from then on, and emptied if that is asked for, which
// makes another storage daemon of it.
func TestRemovedASDIsForgotten(t *testing.T) {
	c := emptyConfig(t)
	h, client := startHost(t, c)
	defer stopHost(t, h)
	ctx := testContext(t)
	asds := objectPool(t, client)
	const pages = 64
	fill(t, h, pages, 1)
	await(t, "objects to be stored", func() bool { _, ok := worst(t, client); return ok })
	addDirs(t, client, 1)
	gone := asds[0]
	if _, err := client.RemoveASD(ctx, gone.ID, true); err != nil {
		t.Fatal(err)
	}
	await(t, "it to leave the list", func() bool {
		_, err := client.ASD(ctx, gone.ID)
		return control.CodeOf(err) == control.CodeNotFound
	})
	if n, ok := worst(t, client); !ok || n != 1 {
		t.Fatalf("%d more disks may die, want 1", n)
	}
	_, err := client.AddASD(ctx, control.AddASD{Address: gone.Address})
	refusedFor(t, err, control.CodeNeedsForce, gone.ID, "--wipe")
	if _, err := os.Stat(filepath.Join(gone.Address, "identity")); err != nil {
		t.Fatalf("what is there was touched: %v", err)
	}
	a, err := client.AddASD(ctx, control.AddASD{Address: gone.Address, Wipe: true})
	if err != nil || a.ID == gone.ID || !a.Up {
		t.Fatalf("added %+v, %v", a, err)
	}
	_, err = client.AddASD(ctx, control.AddASD{Address: gone.Address, Wipe: true}) // in use: nothing to be emptied
	if b, gerr := client.ASD(ctx, a.ID); err != nil || gerr != nil || !b.Up {
		t.Fatalf("added again: %v; %+v, %v", err, b, gerr)
	}
	verify(t, h, pages, 1)
}
