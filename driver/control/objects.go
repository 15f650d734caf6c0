package control

import (
	"context"
	"net/http"
	"net/url"
	"time"
)

// ObjectBackend is about the object store: its storage daemons (ASDs), presets and
// maintenance. Called like the other methods of Backend.
type ObjectBackend interface {
	Presets(ctx context.Context) ([]Preset, error)
	Preset(ctx context.Context, name string) (Preset, error)
	CreatePreset(ctx context.Context, p Preset) (Preset, error)
	// SetPreset changes a preset; objects stored already are upgraded in the background
	// where that makes them better.
	SetPreset(ctx context.Context, p Preset) (Preset, error)

	ASDs(ctx context.Context) ([]ASD, error)
	ASD(ctx context.Context, id string) (ASD, error)
	AddASD(ctx context.Context, req AddASD) (ASD, error)
	// DrainASD gives an ASD nothing new and has what it holds moved away.
	DrainASD(ctx context.Context, id string) (ASD, error)
	// RemoveASD gives an ASD up; CodeNeedsForce if it holds anything.
	RemoveASD(ctx context.Context, id string, force bool) (ASD, error)

	BackendStatus(ctx context.Context) (BackendStatus, error)
	BackendJob(ctx context.Context, name string) (BackendJob, error)
	StartBackendJob(ctx context.Context, name string) (BackendJob, error)
	StopBackendJob(ctx context.Context, name string) (BackendJob, error)
	// RotateKeys wraps all keys with the master key in use.
	RotateKeys(ctx context.Context) (RotatedKeys, error)
}

// RotatedKeys is the outcome of a rotation of the master key.
type RotatedKeys struct {
	MasterKey  string `json:"master_key"` // the ID of the one in use
	Namespaces int    `json:"namespaces"` // whose keys were wrapped by another one
}

// Policy says how an object is spread over ASDs.
type Policy struct {
	K int `json:"k"` // data fragments
	M int `json:"m"` // parity fragments
	C int `json:"c"` // fragments durable before an upload is acknowledged
	X int `json:"x"` // fragments of an object at most in one failure domain
}

// Preset is a named set of rules for storing objects.
type Preset struct {
	Name          string   `json:"name"`
	Policies      []Policy `json:"policies"`       // the first that the ASDs can meet is used
	FragmentBytes int      `json:"fragment_bytes"` // aimed at
	FailureDomain string   `json:"failure_domain"` // disk, host, rack or datacentre: what x counts
	Compression   string   `json:"compression"`    // none, lz4 or zstd
	Encryption    string   `json:"encryption"`     // none or aes-256-gcm
	// Warnings, in answers, are what the preset allows that loses data more easily
	// than it looks.
	Warnings []string `json:"warnings,omitempty"`
}

// AddASD takes a storage daemon into the store. One that was there becomes active.
type AddASD struct {
	Address    string `json:"address"`        // an absolute directory, which the daemon serves itself, or HOST:PORT
	Host       string `json:"host,omitempty"` // default: that of the address, or the daemon's
	Rack       string `json:"rack,omitempty"` // default: the daemon's, for a directory
	Datacentre string `json:"datacentre,omitempty"`
	// Wipe empties a directory whose storage daemon was removed; what is made there is
	// another one.
	Wipe bool `json:"wipe,omitempty"`
}

// ASD is a storage daemon: one disk.
type ASD struct {
	ID         string    `json:"id"`
	Address    string    `json:"address"`
	Host       string    `json:"host"`
	Rack       string    `json:"rack"`
	Datacentre string    `json:"datacentre"`
	State      string    `json:"state"` // active, draining, removed
	Added      time.Time `json:"added"`
	Up         bool      `json:"up"`
	Reason     string    `json:"reason,omitempty"` // why it is down
	DownSince  time.Time `json:"down_since,omitzero"`
	Damaged    string    `json:"damaged,omitempty"` // what is wrong with its key-value store
	Capacity   int64     `json:"capacity"`          // bytes
	Used       int64     `json:"used"`              // bytes
	Full       bool      `json:"full"`
	Shards     int64     `json:"shards"` // parts of objects that it holds
	// Reopened is how often its disk was opened anew because it had failed, since its
	// program's start; LastFailure is why the last time.
	Reopened    uint64 `json:"reopened,omitempty"`
	LastFailure string `json:"last_failure,omitempty"`
}

// BackendStatus is how safe the object store is.
type BackendStatus struct {
	Classes []BackendClass `json:"classes"`
	ASDs    []ASD          `json:"asds"`
	Uploads int            `json:"uploads"` // uploads and moves under way
	Trash   int            `json:"trash"`   // deleted objects that still take room
	Jobs    []BackendJob   `json:"jobs"`
}

// BackendClass is the objects of one preset that are stored under one policy.
type BackendClass struct {
	Preset        string   `json:"preset"`
	Policy        Policy   `json:"policy"`
	FailureDomain string   `json:"failure_domain"`
	Objects       int64    `json:"objects"`
	Bytes         int64    `json:"bytes"`
	Safety        []Safety `json:"safety"` // least safe first
}

// Safety counts objects by how many more disks may die before they can't be read.
type Safety struct {
	Disks   int   `json:"disks"` // -1: they can't be read now
	Objects int64 `json:"objects"`
}

// BackendJob is a job of the object store's maintenance.
type BackendJob struct {
	Name       string    `json:"name"`  // repair, verify, rebalance, orphans
	State      string    `json:"state"` // never (not begun yet), running, done, stopped, failed
	By         string    `json:"by,omitempty"`
	Started    time.Time `json:"started,omitzero"`
	Updated    time.Time `json:"updated,omitzero"`
	Done       int64     `json:"done"`
	Total      int64     `json:"total"` // objects, bytes for verify; 0: not known
	Bytes      int64     `json:"bytes"` // read or written
	Problems   int64     `json:"problems"`
	Message    string    `json:"message,omitempty"`
	ETASeconds float64   `json:"eta_seconds,omitempty"` // 0: can't be told
}

func (s *Server) objectRoutes() map[string]handler {
	return map[string]handler{
		"GET /v1/presets":                    answer(s.backend.Presets),
		"GET /v1/presets/{name}":             named("name", s.backend.Preset),
		"POST /v1/presets":                   s.createPreset,
		"POST /v1/presets/{name}":            s.setPreset,
		"GET /v1/asds":                       answer(s.backend.ASDs),
		"POST /v1/asds":                      s.addASD,
		"GET /v1/asds/{id}":                  named("id", s.backend.ASD),
		"POST /v1/asds/{id}/drain":           named("id", s.backend.DrainASD),
		"DELETE /v1/asds/{id}":               s.removeASD,
		"GET /v1/backend":                    answer(s.backend.BackendStatus),
		"GET /v1/backend/jobs/{name}":        named("name", s.backend.BackendJob),
		"POST /v1/backend/jobs/{name}/start": named("name", s.backend.StartBackendJob),
		"POST /v1/backend/jobs/{name}/stop":  named("name", s.backend.StopBackendJob),
		"POST /v1/backend/keys/rotate":       answer(s.backend.RotateKeys),
	}
}

// answer is the handler of a request without parameters.
func answer[T any](fn func(context.Context) (T, error)) handler {
	return func(r *http.Request) (int, any, error) {
		v, err := fn(r.Context())
		return http.StatusOK, v, err
	}
}

// named is the handler of a request about what its path names.
func named[T any](param string, fn func(context.Context, string) (T, error)) handler {
	return func(r *http.Request) (int, any, error) {
		v, err := fn(r.Context(), r.PathValue(param))
		return http.StatusOK, v, err
	}
}

func (s *Server) createPreset(r *http.Request) (int, any, error) {
	var p Preset
	if err := decode(r, &p); err != nil {
		return 0, nil, err
	}
	p, err := s.backend.CreatePreset(r.Context(), p)
	return http.StatusCreated, p, err
}

func (s *Server) setPreset(r *http.Request) (int, any, error) {
	var p Preset
	if err := decode(r, &p); err != nil {
		return 0, nil, err
	}
	if p.Name != r.PathValue("name") {
		return 0, nil, Errorf(CodeInvalid, "name %q: must be the path's, %q", p.Name, r.PathValue("name"))
	}
	p, err := s.backend.SetPreset(r.Context(), p)
	return http.StatusOK, p, err
}

func (s *Server) addASD(r *http.Request) (int, any, error) {
	var req AddASD
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	a, err := s.backend.AddASD(r.Context(), req)
	return http.StatusCreated, a, err
}

func (s *Server) removeASD(r *http.Request) (int, any, error) {
	force, err := flag(r, "force")
	if err != nil {
		return 0, nil, err
	}
	a, err := s.backend.RemoveASD(r.Context(), r.PathValue("id"), force)
	return http.StatusOK, a, err
}

// Presets lists the object store's presets.
func (c *Client) Presets(ctx context.Context) (list []Preset, err error) {
	return list, c.call(ctx, http.MethodGet, "/v1/presets", nil, &list)
}

// Preset returns one preset.
func (c *Client) Preset(ctx context.Context, name string) (p Preset, err error) {
	return p, c.call(ctx, http.MethodGet, "/v1/presets/"+url.PathEscape(name), nil, &p)
}

// CreatePreset makes a preset.
func (c *Client) CreatePreset(ctx context.Context, p Preset) (made Preset, err error) {
	return made, c.call(ctx, http.MethodPost, "/v1/presets", p, &made)
}

// SetPreset changes a preset.
func (c *Client) SetPreset(ctx context.Context, p Preset) (changed Preset, err error) {
	return changed, c.call(ctx, http.MethodPost, "/v1/presets/"+url.PathEscape(p.Name), p, &changed)
}

// ASDs lists the storage daemons.
func (c *Client) ASDs(ctx context.Context) (list []ASD, err error) {
	return list, c.call(ctx, http.MethodGet, "/v1/asds", nil, &list)
}

// ASD returns one storage daemon.
func (c *Client) ASD(ctx context.Context, id string) (a ASD, err error) {
	return a, c.call(ctx, http.MethodGet, "/v1/asds/"+url.PathEscape(id), nil, &a)
}

// AddASD takes a storage daemon into the store.
func (c *Client) AddASD(ctx context.Context, req AddASD) (a ASD, err error) {
	return a, c.call(ctx, http.MethodPost, "/v1/asds", req, &a)
}

// DrainASD has a storage daemon emptied.
func (c *Client) DrainASD(ctx context.Context, id string) (a ASD, err error) {
	return a, c.call(ctx, http.MethodPost, "/v1/asds/"+url.PathEscape(id)+"/drain", struct{}{}, &a)
}

// RemoveASD gives a storage daemon up, with what it holds if force is set.
func (c *Client) RemoveASD(ctx context.Context, id string, force bool) (a ASD, err error) {
	path := "/v1/asds/" + url.PathEscape(id)
	if force {
		path += "?force=true"
	}
	return a, c.call(ctx, http.MethodDelete, path, nil, &a)
}

// BackendStatus returns how safe the object store is.
func (c *Client) BackendStatus(ctx context.Context) (st BackendStatus, err error) {
	return st, c.call(ctx, http.MethodGet, "/v1/backend", nil, &st)
}

func backendJobPath(name string) string { return "/v1/backend/jobs/" + url.PathEscape(name) }

// BackendJob returns a job of the object store's maintenance.
func (c *Client) BackendJob(ctx context.Context, name string) (j BackendJob, err error) {
	return j, c.call(ctx, http.MethodGet, backendJobPath(name), nil, &j)
}

// StartBackendJob starts a job, or goes on with one that was stopped.
func (c *Client) StartBackendJob(ctx context.Context, name string) (j BackendJob, err error) {
	return j, c.call(ctx, http.MethodPost, backendJobPath(name)+"/start", struct{}{}, &j)
}

// RotateKeys wraps the keys of all volumes with the master key in use.
func (c *Client) RotateKeys(ctx context.Context) (k RotatedKeys, err error) {
	return k, c.call(ctx, http.MethodPost, "/v1/backend/keys/rotate", struct{}{}, &k)
}

// StopBackendJob stops a job until it is started again.
func (c *Client) StopBackendJob(ctx context.Context, name string) (j BackendJob, err error) {
	return j, c.call(ctx, http.MethodPost, backendJobPath(name)+"/stop", struct{}{}, &j)
}
