package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"scoria/integration/bed"
)

// Migration is the state of a machine's migration, as query-migrate has it.
type Migration struct {
	Status string `json:"status"` // "" before the first one
	Error  string `json:"error-desc"`
	Down   int64  `json:"downtime"` // ms, once completed
	RAM    struct {
		Passes      int64 `json:"dirty-sync-count"` // over the memory, the present one included
		Transferred int64 `json:"transferred"`      // bytes
	} `json:"ram"`
}

// Pace bounds a migration: it ends when what is left takes at most Downtime at
// Bandwidth. Both may be changed while it runs.
type Pace struct {
	Bandwidth int64 // bytes/s
	Downtime  time.Duration
}

var (
	// Endless migrations go over the memory of a guest that is busy again and again.
	Endless = Pace{Bandwidth: 64 << 20, Downtime: time.Millisecond}
	// Ending migrations stop the guest as soon as they can.
	Ending = Pace{Bandwidth: 8 << 30, Downtime: 30 * time.Second}
)

// SetPace sets the pace of the machine's present and later migrations.
func (vm *VM) SetPace(ctx context.Context, p Pace) error {
	_, err := vm.Monitor.Execute(ctx, "migrate-set-parameters", map[string]any{
		"max-bandwidth": p.Bandwidth, "downtime-limit": p.Downtime.Milliseconds(),
	})
	return err
}

// Migrate starts a migration to an address on which another machine waits.
func (vm *VM) Migrate(ctx context.Context, address string, p Pace) error {
	if err := vm.SetPace(ctx, p); err != nil {
		return err
	}
	_, err := vm.Monitor.Execute(ctx, "migrate", map[string]any{"uri": address})
	return err
}

// CancelMigration has the guest go on here. It is over when Migration says so.
func (vm *VM) CancelMigration(ctx context.Context) error {
	_, err := vm.Monitor.Execute(ctx, "migrate_cancel", nil)
	return err
}

// Migration returns the state of the last migration from this machine.
func (vm *VM) Migration(ctx context.Context) (Migration, error) {
	var m Migration
	raw, err := vm.Monitor.Execute(ctx, "query-migrate", nil)
	if err == nil {
		err = json.Unmarshal(raw, &m)
	}
	return m, err
}

// Passes waits until a migration has begun its n-th pass over the memory. That it
// has ended instead is an error.
func (vm *VM) Passes(ctx context.Context, n int64) error {
	_, err := vm.await(ctx, fmt.Sprintf("pass %d of the migration", n), func(m Migration) bool {
		return m.RAM.Passes >= n && m.Status == "active"
	})
	return err
}

// Migrated waits for a migration's end, and returns its state.
func (vm *VM) Migrated(ctx context.Context, status string) (Migration, error) {
	return vm.await(ctx, "the migration to be "+status, func(m Migration) bool { return m.Status == status })
}

// await waits for a state of the migration. Another end of it is an error.
func (vm *VM) await(ctx context.Context, what string, cond func(Migration) bool) (m Migration, err error) {
	last := ""
	err = bed.Poll(ctx, 20*time.Millisecond, what, func() (bool, error) {
		raw, err := vm.Monitor.Execute(ctx, "query-migrate", nil)
		if err != nil {
			return false, err
		}
		m, last = Migration{}, string(raw)
		if err := json.Unmarshal(raw, &m); err != nil {
			return false, err
		}
		if cond(m) {
			return true, nil
		}
		switch m.Status {
		case "failed", "completed", "cancelled":
			return false, errors.New("the migration has ended")
		}
		return false, nil
	})
	if err != nil {
		err = fmt.Errorf("%w; migration: %s", err, last)
	}
	return m, err
}

// TakeOver goes on with the guest of another machine, which has been migrated to
// this one and had no job under way but those in the background.
func (vm *VM) TakeOver(ctx context.Context, from *VM) error {
	if err := vm.port.adopt(from.port); err != nil {
		return err
	}
	return bed.Poll(ctx, 20*time.Millisecond, "the guest to go on after its migration", func() (bool, error) {
		if err := vm.Dead(); err != nil {
			return false, err
		}
		s, err := vm.Status(ctx)
		return s == "running", err
	})
}
