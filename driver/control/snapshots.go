package control

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/google/uuid"
)

// Snapshot describes a snapshot of a volume.
type Snapshot struct {
	Volume    string            `json:"volume"` // POOL/VOLUME
	Name      string            `json:"name"`   // without the volume
	ID        uuid.UUID         `json:"id"`
	Created   time.Time         `json:"created"`
	Size      uint64            `json:"size"` // of the volume then, bytes
	Metadata  map[string]string `json:"metadata,omitempty"`
	State     string            `json:"state"`           // creating, ready, deleting
	Alone     *uint64           `json:"alone,omitempty"` // bytes that its deletion would give back; absent: not known
	Clones    []string          `json:"clones,omitempty"`
	Temporary bool              `json:"temporary,omitempty"` // of an operation under way
	Adopted   bool              `json:"adopted,omitempty"`   // the registry had lost it; renaming it ends this
	NBD       string            `json:"nbd,omitempty"`       // URI for qemu-img and others, read-only
}

// Bounds of a snapshot's metadata.
const (
	MaxMetadata      = 64
	MaxMetadataBytes = 16 << 10 // keys and values together
)

// CreateSnapshot asks for a snapshot.
type CreateSnapshot struct {
	Name     string            `json:"name"`
	Metadata map[string]string `json:"metadata,omitempty"` // at most MaxMetadata
	// Temporary: it goes, if nobody deletes it before, with the client that keeps the
	// hold Owner, or at the daemon's next start.
	Temporary bool   `json:"temporary,omitempty"`
	Owner     string `json:"owner,omitempty"`
}

// RenameSnapshot asks for another name.
type RenameSnapshot struct {
	Name string `json:"name"`
}

// Rollback asks for a snapshot's state.
type Rollback struct {
	Force bool `json:"force,omitempty"` // drop later snapshots
}

// CloneVolume asks for a volume that begins as a snapshot. Zero values take the
// parent's.
type CloneVolume struct {
	From    string `json:"from"`               // POOL/VOLUME@SNAPSHOT; of a template, POOL/VOLUME is enough
	Name    string `json:"name"`               // POOL/VOLUME
	Size    uint64 `json:"size,omitempty"`     // bytes, not less than the snapshot's
	SCOSize int64  `json:"sco_size,omitempty"` // bytes, a multiple of 1 MiB
	Serial  string `json:"serial,omitempty"`   // at most 20 bytes; default: from the ID
}

// SetTemplate makes a volume a template, or an ordinary one again.
type SetTemplate struct {
	Template bool `json:"template"`
}

// Incomplete is an import or receive that has not ended.
type Incomplete struct {
	Kind      string    `json:"kind"` // import, receive
	Snapshot  uuid.UUID `json:"snapshot,omitzero"`
	Position  uint64    `json:"position"` // where a resumed export has to start, bytes
	Resumable bool      `json:"resumable"`
}

// Received is what a receive has brought.
type Received struct {
	Volume   string   `json:"volume"`
	Snapshot Snapshot `json:"snapshot"`
	Data     uint64   `json:"data"`   // bytes
	Zeroes   uint64   `json:"zeroes"` // bytes
}

// Export says what is to be written to a stream (package stream).
type Export struct {
	Volume   string // POOL/VOLUME
	Snapshot string
	Since    string // earlier snapshot; empty: everything
	Start    uint64 // first byte of the volume; what lies before was received already
}

// SnapshotBackend is the part of Backend that is about snapshots, clones and
// streams. Snapshot names are not yet validated.
type SnapshotBackend interface {
	Snapshots(ctx context.Context, volume string) ([]Snapshot, error)
	Snapshot(ctx context.Context, volume, name string) (Snapshot, error)
	CreateSnapshot(ctx context.Context, volume string, req CreateSnapshot) (Snapshot, error)
	DeleteSnapshot(ctx context.Context, volume, name string) error
	RenameSnapshot(ctx context.Context, volume, name, to string) (Snapshot, error)
	// Rollback fails with CodeNeedsForce if later snapshots would go.
	Rollback(ctx context.Context, volume, name string, force bool) (Volume, error)

	CloneVolume(ctx context.Context, req CloneVolume) (Volume, error)
	SetTemplate(ctx context.Context, volume string, template bool) (Volume, error)
	FlattenVolume(ctx context.Context, volume string, p Progress) error

	// Complete ends an import: the volume is one like any other.
	Complete(ctx context.Context, volume string) (Volume, error)
	// Export writes a stream to w. If the request is refused, nothing was written.
	Export(ctx context.Context, req Export, w io.Writer) error
	// Receive applies a stream. It returns when its trailer was read and all is
	// durable; if it fails, the volume is as before, unless resumable.
	Receive(ctx context.Context, volume string, resumable bool, r io.Reader) (Received, error)
	// AbortReceive undoes a receive that could be resumed.
	AbortReceive(ctx context.Context, volume string) error
}

// snapshotRoutes are the handlers of snapshots and clones.
func (s *Server) snapshotRoutes() map[string]handler {
	return map[string]handler{
		"GET /v1/volumes/{pool}/{name}/snapshots":                      s.listSnapshots,
		"POST /v1/volumes/{pool}/{name}/snapshots":                     s.createSnapshot,
		"GET /v1/volumes/{pool}/{name}/snapshots/{snapshot}":           s.showSnapshot,
		"DELETE /v1/volumes/{pool}/{name}/snapshots/{snapshot}":        s.deleteSnapshot,
		"POST /v1/volumes/{pool}/{name}/snapshots/{snapshot}/rename":   s.renameSnapshot,
		"POST /v1/volumes/{pool}/{name}/snapshots/{snapshot}/rollback": s.rollback,
		"POST /v1/clones":                             s.cloneVolume,
		"POST /v1/volumes/{pool}/{name}/template":     s.setTemplate,
		"POST /v1/volumes/{pool}/{name}/flatten":      s.flattenVolume,
		"POST /v1/volumes/{pool}/{name}/complete":     s.complete,
		"DELETE /v1/volumes/{pool}/{name}/incomplete": s.abortReceive,
	}
}

func (s *Server) listSnapshots(r *http.Request) (int, any, error) {
	list, err := s.backend.Snapshots(r.Context(), volumeName(r))
	return http.StatusOK, list, err
}

func (s *Server) createSnapshot(r *http.Request) (int, any, error) {
	var req CreateSnapshot
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	if err := checkMetadata(req.Metadata); err != nil {
		return 0, nil, err
	}
	snap, err := s.backend.CreateSnapshot(r.Context(), volumeName(r), req)
	return http.StatusCreated, snap, err
}

func checkMetadata(meta map[string]string) error {
	if len(meta) > MaxMetadata {
		return Errorf(CodeInvalid, "metadata: %d entries, at most %d are allowed", len(meta), MaxMetadata)
	}
	n := 0
	for k, v := range meta {
		if k == "" {
			return Errorf(CodeInvalid, "metadata: a key is empty")
		}
		n += len(k) + len(v)
	}
	if n > MaxMetadataBytes {
		return Errorf(CodeInvalid, "metadata: %d bytes, at most %d are allowed", n, MaxMetadataBytes)
	}
	return nil
}

func (s *Server) showSnapshot(r *http.Request) (int, any, error) {
	snap, err := s.backend.Snapshot(r.Context(), volumeName(r), r.PathValue("snapshot"))
	return http.StatusOK, snap, err
}

func (s *Server) deleteSnapshot(r *http.Request) (int, any, error) {
	return http.StatusNoContent, nil, s.backend.DeleteSnapshot(r.Context(), volumeName(r), r.PathValue("snapshot"))
}

func (s *Server) renameSnapshot(r *http.Request) (int, any, error) {
	var req RenameSnapshot
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	snap, err := s.backend.RenameSnapshot(r.Context(), volumeName(r), r.PathValue("snapshot"), req.Name)
	return http.StatusOK, snap, err
}

func (s *Server) rollback(r *http.Request) (int, any, error) {
	var req Rollback
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	v, err := s.backend.Rollback(r.Context(), volumeName(r), r.PathValue("snapshot"), req.Force)
	return http.StatusOK, v, err
}

func (s *Server) cloneVolume(r *http.Request) (int, any, error) {
	var req CloneVolume
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	v, err := s.backend.CloneVolume(r.Context(), req)
	return http.StatusCreated, v, err
}

func (s *Server) setTemplate(r *http.Request) (int, any, error) {
	var req SetTemplate
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	v, err := s.backend.SetTemplate(r.Context(), volumeName(r), req.Template)
	return http.StatusOK, v, err
}

func (s *Server) flattenVolume(r *http.Request) (int, any, error) {
	name := volumeName(r)
	if _, err := s.backend.Volume(r.Context(), name); err != nil {
		return 0, nil, err
	}
	j, err := s.jobs.start("flatten", name, func(ctx context.Context, p Progress) (*CheckReport, error) {
		return nil, s.backend.FlattenVolume(ctx, name, p)
	})
	return http.StatusAccepted, j, err
}

func (s *Server) complete(r *http.Request) (int, any, error) {
	v, err := s.backend.Complete(r.Context(), volumeName(r))
	return http.StatusOK, v, err
}

func (s *Server) abortReceive(r *http.Request) (int, any, error) {
	return http.StatusNoContent, nil, s.backend.AbortReceive(r.Context(), volumeName(r))
}

// flag reads a yes-or-no parameter of a request.
func flag(r *http.Request, name string) (bool, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return false, nil
	}
	v, err := strconv.ParseBool(text)
	if err != nil {
		return false, Errorf(CodeInvalid, "%s %q: must be true or false", name, text)
	}
	return v, nil
}

func snapshotPath(volume, name string) string {
	return volumePath(volume) + "/snapshots/" + url.PathEscape(name)
}

// Snapshots lists a volume's snapshots, oldest first.
func (c *Client) Snapshots(ctx context.Context, volume string) (list []Snapshot, err error) {
	return list, c.call(ctx, http.MethodGet, volumePath(volume)+"/snapshots", nil, &list)
}

// Snapshot describes one snapshot.
func (c *Client) Snapshot(ctx context.Context, volume, name string) (s Snapshot, err error) {
	return s, c.call(ctx, http.MethodGet, snapshotPath(volume, name), nil, &s)
}

// CreateSnapshot makes a snapshot of a volume as it is now.
func (c *Client) CreateSnapshot(ctx context.Context, volume string, req CreateSnapshot) (s Snapshot, err error) {
	return s, c.call(ctx, http.MethodPost, volumePath(volume)+"/snapshots", req, &s)
}

// DeleteSnapshot deletes a snapshot that nothing uses.
func (c *Client) DeleteSnapshot(ctx context.Context, volume, name string) error {
	return c.call(ctx, http.MethodDelete, snapshotPath(volume, name), nil, nil)
}

// RenameSnapshot gives a snapshot another name.
func (c *Client) RenameSnapshot(ctx context.Context, volume, name, to string) (s Snapshot, err error) {
	return s, c.call(ctx, http.MethodPost, snapshotPath(volume, name)+"/rename", RenameSnapshot{Name: to}, &s)
}

// Rollback makes a volume what it was at a snapshot.
func (c *Client) Rollback(ctx context.Context, volume, name string, force bool) (v Volume, err error) {
	return v, c.call(ctx, http.MethodPost, snapshotPath(volume, name)+"/rollback", Rollback{Force: force}, &v)
}

// CloneVolume makes a volume from a snapshot.
func (c *Client) CloneVolume(ctx context.Context, req CloneVolume) (v Volume, err error) {
	return v, c.call(ctx, http.MethodPost, "/v1/clones", req, &v)
}

// SetTemplate makes a volume a template, or an ordinary one again.
func (c *Client) SetTemplate(ctx context.Context, volume string, template bool) (v Volume, err error) {
	return v, c.call(ctx, http.MethodPost, volumePath(volume)+"/template", SetTemplate{Template: template}, &v)
}

// StartFlatten begins to make a clone independent of its parent.
func (c *Client) StartFlatten(ctx context.Context, volume string) (j Job, err error) {
	return j, c.call(ctx, http.MethodPost, volumePath(volume)+"/flatten", struct{}{}, &j)
}

// Complete ends an import.
func (c *Client) Complete(ctx context.Context, volume string) (v Volume, err error) {
	return v, c.call(ctx, http.MethodPost, volumePath(volume)+"/complete", struct{}{}, &v)
}

// AbortReceive undoes a receive that could be resumed.
func (c *Client) AbortReceive(ctx context.Context, volume string) error {
	return c.call(ctx, http.MethodDelete, volumePath(volume)+"/incomplete", nil, nil)
}
