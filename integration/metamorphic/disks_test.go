package metamorphic

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"

	"scoria/alba/asd"
	"scoria/driver/control"
)

// diskSlots is how many directories there are for storage daemons. At least
// storageDaemons of them are in use and take something new, always, so that an object is
// whole on disks of which only the first fails.
const diskSlots = 5

var asdDirs = func() (dirs []string) {
	for i := range diskSlots {
		dirs = append(dirs, asdDir(i))
	}
	return dirs
}()

// maxKeys is how many master keys the file has at most.
const maxKeys = 4

// disks are the storage daemons by their slots; nil where none is in use.
func (r *run) disks() (list [diskSlots]*control.ASD, err error) {
	err = r.ask("storage daemons", func(ctx context.Context, c *control.Client) error {
		asds, err := c.ASDs(ctx)
		for i := range asds {
			slot := slices.Index(asdDirs, asds[i].Address)
			switch {
			case asds[i].State == "removed":
			case slot < 0 || list[slot] != nil:
				return fmt.Errorf("storage daemon %+v is one too many", asds[i])
			default:
				list[slot] = &asds[i]
			}
		}
		return err
	})
	return list, err
}

// slotsOf lists the slots with a storage daemon in a state; "" is for those without one.
func slotsOf(list [diskSlots]*control.ASD, state string) (slots []int) {
	for i, a := range list {
		if a == nil && state == "" || a != nil && a.State == state {
			slots = append(slots, i)
		}
	}
	return slots
}

// nth picks an element; false if there is none.
func nth(slots []int, n uint64) (int, bool) {
	if len(slots) == 0 {
		return 0, false
	}
	return slots[n%uint64(len(slots))], true
}

// addDisk takes a storage daemon in, or back if it is being drained. One that was removed
// needs the word of the operator, unless objects refer to it still.
func (r *run) addDisk(o op) error {
	list, err := r.disks()
	if err != nil || r.w.life.died() || r.w.settings.DirOnly {
		return err
	}
	slot, ok := nth(append(slotsOf(list, ""), slotsOf(list, "draining")...), o.N)
	if !ok || slot == 0 && r.w.life.asdDown.Load() {
		return nil
	}
	var a control.ASD
	add := func() error {
		return r.manage(o.Kind, func(ctx context.Context, c *control.Client) (err error) {
			a, err = c.AddASD(ctx, control.AddASD{Address: asdDir(slot), Wipe: o.has("wipe")})
			return err
		})
	}
	err = add()
	// A disk that has failed till now is opened anew in a second or more.
	for end := time.Now().Add(patience); slot == 0 && failed(err) && !r.w.life.died() && time.Now().Before(end); err = add() {
		time.Sleep(10 * time.Millisecond)
	}
	if control.CodeOf(err) == control.CodeNeedsForce && r.w.removed[slot] && !o.has("wipe") {
		return nil
	}
	if err == nil && !r.w.life.died() && a.State != "active" {
		err = fmt.Errorf("%s is added and %s", a.Address, a.State)
	}
	return r.mend(err)
}

// failed says whether a storage daemon takes no writes until its disk is opened anew.
func failed(err error) bool {
	return err != nil && strings.Contains(err.Error(), asd.ErrFailed.Error())
}

// drain has a storage daemon emptied.
func (r *run) drain(o op) error {
	list, err := r.disks()
	if err != nil || r.w.life.died() {
		return err
	}
	active := slotsOf(list, "active")
	slot, ok := nth(active, o.N)
	if !ok || len(active) <= storageDaemons {
		return nil
	}
	r.w.moved = true
	var a control.ASD
	err = r.manage(o.Kind, func(ctx context.Context, c *control.Client) (err error) {
		a, err = c.DrainASD(ctx, list[slot].ID)
		return err
	})
	if err == nil && !r.w.life.died() && a.State != "draining" {
		err = fmt.Errorf("%s is drained and %s", a.Address, a.State)
	}
	return r.mend(err)
}

// removeDisk removes a storage daemon that is being drained, or tries to with another one
// that has something: which is refused.
func (r *run) removeDisk(o op) error {
	list, err := r.disks()
	if err != nil || r.w.life.died() {
		return err
	}
	candidates := slotsOf(list, "draining")
	if active := slotsOf(list, "active"); len(active) > storageDaemons {
		candidates = append(candidates, slices.DeleteFunc(active, func(slot int) bool { return list[slot].Shards == 0 })...)
	}
	slot, ok := nth(candidates, o.N)
	if !ok {
		return nil
	}
	r.w.moved, r.w.removed[slot] = true, true
	var a control.ASD
	err = r.manage(o.Kind, func(ctx context.Context, c *control.Client) (err error) {
		a, err = c.RemoveASD(ctx, list[slot].ID, false)
		return err
	})
	switch {
	case control.CodeOf(err) == control.CodeNeedsForce:
		return nil
	case err == nil && !r.w.life.died() && list[slot].Shards > 0 && a.Shards > 0:
		return fmt.Errorf("%s is removed with parts of %d objects", a.Address, a.Shards)
	}
	return r.mend(err)
}

// replaceDisk gives the first storage daemon up while its disk fails, with what it holds,
// if there are others enough and nothing needs it.
func (r *run) replaceDisk(o op) error {
	list, err := r.disks()
	if err != nil || !r.w.life.asdDown.Load() || r.w.life.died() {
		return err
	}
	others := slices.DeleteFunc(slotsOf(list, "active"), func(slot int) bool { return slot == 0 })
	if list[0] == nil || list[0].Up || len(others) < storageDaemons {
		return nil
	}
	// An upload that began before it was seen to be down may be on it: none of these is
	// under way before all objects are looked at.
	for _, atRest := range []bool{true, false} {
		st, err := r.backend()
		if err != nil || r.w.life.died() {
			return err
		}
		if atRest && st.Uploads > 0 || least(st) < 0 {
			return nil
		}
	}
	r.w.moved, r.w.removed[0] = true, true
	err = r.manage(o.Kind, func(ctx context.Context, c *control.Client) error {
		_, err := c.RemoveASD(ctx, list[0].ID, true)
		return err
	})
	return r.mend(err)
}

// mend has maintenance look at once, after what did not fail.
func (r *run) mend(err error) error {
	if err != nil || r.w.life.died() {
		return err
	}
	return r.ask("repair", func(ctx context.Context, c *control.Client) error {
		_, err := c.StartBackendJob(ctx, "repair")
		return err
	})
}

func (r *run) backend() (st control.BackendStatus, err error) {
	err = r.ask("status of the object store", func(ctx context.Context, c *control.Client) (err error) {
		st, err = c.BackendStatus(ctx)
		return err
	})
	return st, err
}

// least is how many disks the least safe object can lose; negative: it can't be read.
func least(st control.BackendStatus) int {
	disks := storageDaemons
	for _, c := range st.Classes {
		for _, s := range c.Safety {
			if s.Objects > 0 {
				disks = min(disks, s.Disks)
			}
		}
	}
	return disks
}

// settle waits until every object can lose a disk, removes those that are drained, and
// rotates the master key: all that disks and keys were through must come to a good end.
func (r *run) settle(op) error {
	if r.w.settings.DirOnly {
		return nil
	}
	const pause, ask = 10 * time.Millisecond, 50
	end := time.Now().Add(patience)
	for i := 1; ; i++ {
		err := r.settled()
		if err == nil || r.w.life.died() {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("after %v: %w\n%s", patience, err, dump())
		}
		if i%ask == 0 {
			if err := r.mend(nil); err != nil {
				return err
			}
		}
		time.Sleep(pause)
	}
}

// settled says what is missing to the good end.
func (r *run) settled() error {
	list, err := r.disks()
	if err != nil {
		return err
	}
	for slot, a := range list {
		switch {
		case a == nil:
		case !a.Up:
			return fmt.Errorf("%s is down: %s", a.Address, a.Reason)
		case a.State == "draining" && a.Shards > 0:
			return fmt.Errorf("%s is drained and has parts of %d objects", a.Address, a.Shards)
		case a.State == "draining":
			r.w.removed[slot] = true
			if err := r.ask("removal", func(ctx context.Context, c *control.Client) error {
				_, err := c.RemoveASD(ctx, a.ID, false)
				return err
			}); err != nil {
				return err
			}
		}
	}
	if len(r.w.keyring) > 1 {
		if err := r.rotateKeys(op{Kind: "rotate"}); err != nil {
			return err
		}
		if len(r.w.keyring) > 1 {
			return errors.New("the older master keys are still needed")
		}
	}
	st, err := r.backend()
	if err == nil && least(st) < 1 {
		err = fmt.Errorf("objects are less safe than they could be: %+v", st)
	}
	return err
}

// newKey puts another master key in front and starts the daemon again, which reads them
// then.
func (r *run) newKey(o op) error {
	if len(r.w.keyring) >= maxKeys {
		return nil
	}
	key := make([]byte, 32)
	rng := rand.New(rand.NewPCG(o.Seed, 17))
	for i := range key {
		key[i] = byte(rng.Uint32())
	}
	if err := r.w.writeKeys(append([]string{hex.EncodeToString(key)}, r.w.keyring...)); err != nil {
		return err
	}
	return r.restart(o)
}

// rotateKeys wraps all keys with the first master key. Once that is done, the others are
// destroyed: every later start does without them. While a storage daemon is away it may
// be refused.
func (r *run) rotateKeys(o op) error {
	err := r.manage(o.Kind, func(ctx context.Context, c *control.Client) error {
		_, err := c.RotateKeys(ctx)
		return err
	})
	if r.w.life.died() || control.CodeOf(err) == control.CodeUnavailable {
		return nil
	}
	if err != nil {
		return err
	}
	return r.w.writeKeys(r.w.keyring[:1])
}

// writeKeys says which master keys there are from the next start on.
func (w *world) writeKeys(keys []string) error {
	w.keyring = keys
	return os.WriteFile(w.keys(), []byte(strings.Join(keys, "\n")+"\n"), 0o600)
}
